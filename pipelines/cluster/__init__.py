"""Ray: connect to it or start it, resolve devices, launch workers, explain failures, submit jobs.

Workers import `worker`, `threads`, `progress`, `transfer` and `network` alone; the rest is the driver's. Ray's private
names stand in `ray_private` and nowhere else.
"""
