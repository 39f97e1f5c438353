"""The control plane's mind: pure planning, and the service that carries plans out.

Pure (values in, actions out; nothing here may block): `view`, `detector`, `placement`,
`first_conf`, `failover`, `verify`, `requests`, `planner`, `states`, `health`, `specs`. `service`
owns the records, the agents' sessions and the loop that reconciles them.
"""
