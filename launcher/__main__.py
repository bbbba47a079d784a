"""`python -m launcher` is the loldu command, for starters of modules: accelerate launch -m launcher factorize ..."""

from loldu import main

if __name__ == "__main__":
    raise SystemExit(main())
