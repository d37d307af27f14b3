"""``python -m kvstore_svc``: the KV store. ``redis-worker`` as first argument is what it starts for itself.

Exit statuses are those of `albireo.supervise`.
"""

import sys

from albireo.watchdog import Watchdog


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["redis-worker"]:
        from kvstore_svc.redis_worker import main as run_redis_worker

        return run_redis_worker(argv[1:])
    watchdog = Watchdog()
    watchdog.start_thread()  # importing takes a while
    from kvstore_svc.main import main as run_store

    return run_store(argv, watchdog)


if __name__ == "__main__":
    sys.exit(main())
