"""What another process does at the worst moment."""
import fcntl


def meanwhile(monkeypatch, act) -> None:
    """Have it happen once, just before the next file is locked."""
    lock = fcntl.flock

    def late(*args):
        monkeypatch.setattr(fcntl, "flock", lock)
        act()
        return lock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
