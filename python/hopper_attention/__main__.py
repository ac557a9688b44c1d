"""Makes `python -m hopper_attention` the same as the `hopper-attention` command."""

from .cli import main

if __name__ == "__main__":
    main()
