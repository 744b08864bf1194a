"""The API server: everything that speaks to it, and the only place that imports kopf and kubernetes.

codec        objects as values, status as a merge patch
cache        the sets that this operator serves
login        where the API server is and who we are, for kopf and for our own requests
cluster      our own requests: list, write a status, post Events
source       the watch, by kopf
sweep        the list that makes up for what a watch misses
lease        which of several replicas works
recorder     Kubernetes Events
series       which Events are repeats, and when their count is written
tokenbucket  how many Events one set may have
"""

__all__: list[str] = []
