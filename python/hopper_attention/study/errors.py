"""The error that the study raises for what its user can put right."""


class StudyError(Exception):
    """Something that the user of the study can put right; the message says how."""
