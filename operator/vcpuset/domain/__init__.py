"""Values and decisions: the resource, the machine as observed, the plan, the conditions, the errors.

Nothing here waits, reads a clock or knows a client library: every module imports only the standard library, so each
decision can be tested with plain values.
"""
