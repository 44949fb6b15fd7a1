"""`python -m captionscale`."""

from captionscale.cli import main

if __name__ == "__main__":
    main()
