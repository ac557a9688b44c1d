"""The error study: how far attention in low precision is from attention in float64.

`run_study` takes Q, K and V from a model's attention layers run on a text, and from the
distributions of the FlashAttention-3 paper; runs standard attention and ours on them in each
format; and measures both against float64. `hopper-attention study` is its command line.
"""

from .errors import StudyError
from .records import Row, Source, Study
from .run import run_study
from .settings import SOURCES, Progress, Settings

__all__ = [
    "SOURCES",
    "Progress",
    "Row",
    "Settings",
    "Source",
    "Study",
    "StudyError",
    "run_study",
]
