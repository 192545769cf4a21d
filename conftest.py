"""Settings of all tests in the repository."""

from hypothesis import settings

# A shared machine may stall for a second in any example; time is judged in benchmarks alone.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")
