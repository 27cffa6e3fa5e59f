"""The network: an interface (``base``), the real one (``zeromq``), and one inside a process (``memory``)."""
