"""A seekable, read-only file over one object of a store, for readers that need only parts of it."""

import io

from storage.object_store import Store


class RangeFile(io.RawIOBase):
    """Reads byte ranges of an object on demand; each read is one request."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        """Open `key`, which holds `size` bytes."""
        super().__init__()
        self._store = store
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Tell that it can be read: always."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be positioned: always."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, relative to the start, the position or the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return up to `size` bytes from the position on; all of them when it is negative or None."""
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if not count:
            return b""
        data = self._store.read_range(self._key, self._position, self._position + count)
        self._position += len(data)
        return data
