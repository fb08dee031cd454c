"""`python -m pipeline` is `lathe`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
