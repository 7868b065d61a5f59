"""`python -m hf_turbo train.py ARGS`: see launch.py."""

from .launch import main

if __name__ == "__main__":
    main()
