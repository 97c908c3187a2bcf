"""``python -m nbfmha``: the same as the ``nbfmha`` command."""

from nbfmha.cli import main

if __name__ == "__main__":
    main()
