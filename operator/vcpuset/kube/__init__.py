"""The API server: everything that connects to it, and the only package that imports kopf and kubernetes.

codec        objects as values, status as a merge patch
cache        the sets that this operator manages
login        the address and credentials of the API server, for kopf and for our own requests
cluster      our own requests: list, write a status, post Events
source       the watch, by kopf
sweep        the list that finds what the watch missed
lease        leader election
recorder     Kubernetes Events
series       which Events are repeats, and when their count is written
tokenbucket  how many Events one set may have
"""

__all__: list[str] = []
