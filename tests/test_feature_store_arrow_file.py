"""Bytes that Arrow's threads read are Arrow's own, so none needs the GIL when the interpreter ends."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foldfeed.feature_store.storage.arrow_file import arrow_file


def test_what_is_read_from_belongs_to_arrow() -> None:
    table = pa.table({"record_id": ["a", "b"], "length": [3, 5]})
    file = io.BytesIO()
    pq.write_table(table, file)
    data = bytearray(file.getvalue())
    opened = pq.ParquetFile(arrow_file(data))
    # Arrow's usual way holds on to the object: a bytearray that somebody holds cannot change its length.
    usual = pa.BufferReader(data)
    with pytest.raises(BufferError):
        data.clear()
    usual.close()
    del usual
    data.clear()
    assert opened.read().equals(table)


@pytest.mark.parametrize("data", [b"", b"abc", memoryview(b"abc"), memoryview(np.arange(6, dtype=np.uint8))])
def test_any_bytes_come_back(data: bytes | memoryview) -> None:
    assert arrow_file(data).read() == bytes(data)
