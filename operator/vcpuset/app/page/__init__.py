"""The status page: what this process knows of the VCPUSets that it manages, for people with a browser. Read-only."""
