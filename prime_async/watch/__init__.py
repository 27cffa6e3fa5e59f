"""What is shown of a run: its history, the web page, metrics, and sinks. Nothing here decides anything."""
