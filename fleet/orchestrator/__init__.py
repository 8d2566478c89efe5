"""Who runs what, where: workers, jobs and gangs. Never touches a tensor."""
