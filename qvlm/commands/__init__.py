"""The subcommands of ``qvlm``, a file each."""
