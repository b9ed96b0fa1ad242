"""``python -m srpo_cli`` is the ``srpo`` command; torchrun starts its workers this way."""

from srpo_cli.cli.app import main

if __name__ == "__main__":
    main()
