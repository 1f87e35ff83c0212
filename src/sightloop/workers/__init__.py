"""Workers that load their models once and answer requests: processes of this machine, or actors of a Ray cluster."""
