"""One thin file per subcommand: options in, library call, result out. Nothing here imports torch before it runs."""
