"""`vcpuset metrics-api`: the custom metrics API of Kubernetes for VCPUSets (`custom.metrics.k8s.io/v1beta2`).

An aggregated API: the API server proxies requests to it, as for HorizontalPodAutoscalers. It keeps no values. It asks
the process that manages a VCPUSet, at each request.

settings      the flags
frontproxy    whom the API server's front proxy speaks for
access        whether a user may read a metric
certificates  the serving certificate: made and renewed here, or from files
sources       how busy a machine is, asked of the process that manages it
api           the HTTP API
server        the process
"""
