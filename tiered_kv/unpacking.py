"""Unpacks msgpack data that may be hostile. Lengths in the data are accepted only up to limits, and nothing in the data can run code.

`msgpack` allocates the memory of an array when it reads the array's header. So a few bytes could make it allocate gigabytes, at each
level of nesting.
"""

from typing import Any

import msgpack

ITEMS_MAX = 1 << 18
"""The largest number of items in one array or mapping. Their references take 2 MiB."""
DEPTH_MAX = 16
_NESTING = (list, dict)


def unpacked(
    data: bytes | bytearray | memoryview, *, items_max: int = ITEMS_MAX, depth_max: int = DEPTH_MAX, keys: type | None = None
) -> Any:
    """Returns the content of `data`. Raises ValueError if it is not msgpack, or exceeds a limit.

    `items_max`: the largest number of items in one array or mapping. `depth_max`: the largest depth of nested arrays and mappings; 0 for
    any depth that msgpack allows, which is 1,024 (Python can neither compare nor print data of that depth). Checking the depth takes
    about 20 ns per item. `keys`: int allows numbers as keys of mappings.
    """
    try:
        found = msgpack.unpackb(data, max_array_len=items_max, max_map_len=items_max, max_ext_len=0, strict_map_key=keys is not int)
    except (MemoryError, msgpack.UnpackException) as error:
        raise ValueError(f"not valid msgpack, or too large: {type(error).__name__}") from error
    level = [found] if type(found) in _NESTING else []
    for _ in range(depth_max):
        if not level:
            return found
        level = [item for each in level for item in (each.values() if type(each) is dict else each) if type(item) in _NESTING]
    if level and depth_max:
        raise ValueError(f"arrays and mappings must be at most {depth_max} deep")
    return found
