"""Who runs the client halves: in this process (``local``), or across machines (``flower``)."""
