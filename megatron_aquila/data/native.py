"""The one door to the C++ extension: it where it is built, else the numpy reference, which gives identical values."""

try:
    from megatron_aquila._native import (
        LegacyShuffle,
        build_blending_indices,
        build_exhaustive_blending_indices,
        fill_sample_index,
        insert_breaks,
        join_lines,
        lay_out,
        read_sample,
        split_documents,
    )

    INDEX_BUILDER = "C++ extension"
except ImportError:
    from megatron_aquila.data.reference import (  # type: ignore[assignment]
        LegacyShuffle,
        build_blending_indices,
        build_exhaustive_blending_indices,
        fill_sample_index,
        insert_breaks,
        lay_out,
        read_sample,
        split_documents,
    )

    join_lines = None  # type: ignore[assignment]  # lines are read one by one then
    INDEX_BUILDER = "numpy, slower: the C++ extension is not built (python setup.py build_ext --inplace)"

__all__ = [
    "INDEX_BUILDER",
    "LegacyShuffle",
    "build_blending_indices",
    "build_exhaustive_blending_indices",
    "fill_sample_index",
    "insert_breaks",
    "join_lines",
    "lay_out",
    "read_sample",
    "split_documents",
]
