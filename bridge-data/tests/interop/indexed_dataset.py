#!/usr/bin/env python3
"""Reads and writes indexed datasets with Megatron-Core's own code, to compare with this crate.

    python indexed_dataset.py available               exits with 0 if Megatron-Core can be imported
    python indexed_dataset.py read PREFIX CONTENT     compares a dataset with CONTENT, a JSON file
    python indexed_dataset.py write PREFIX CONTENT    writes a dataset from CONTENT

CONTENT: {"dtype": "uint16", "documents": [[[1, 2], [3]], ...], "modes": [0, 1, ...] or null}, where a document is a list of
sequences and a sequence a list of tokens. Needs megatron-core, torch and numpy (checked with megatron-core 0.16.1).
"""
import json
import sys
import warnings


def read(dataset_class, prefix, content):
    import numpy

    multimodal = content["modes"] is not None
    for mmap in (True, False):
        dataset = dataset_class(prefix, multimodal=multimodal, mmap=mmap)
        sequences = [sequence for document in content["documents"] for sequence in document]
        assert len(dataset) == len(sequences), (len(dataset), len(sequences))
        assert dataset.index.dtype == getattr(numpy, content["dtype"]), dataset.index.dtype
        assert dataset.sequence_lengths.tolist() == [len(sequence) for sequence in sequences]
        borders = [0]
        for document in content["documents"]:
            borders.append(borders[-1] + len(document))
        assert dataset.document_indices.tolist() == borders, dataset.document_indices
        for number, sequence in enumerate(sequences):
            found = dataset[number]
            if multimodal:
                found, mode = found
                assert mode == content["modes"][number], (number, mode)
            assert found.dtype == dataset.index.dtype and found.tolist() == sequence, (number, found, sequence)


def write(builder_class, prefix, content):
    import numpy
    import torch

    modes = content["modes"]
    dtype = getattr(numpy, content["dtype"])
    builder = builder_class(prefix + ".bin", dtype=dtype, multimodal=modes is not None)
    number = 0
    for document in content["documents"]:
        for sequence in document:
            mode = 0 if modes is None else modes[number]
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode)
            number += 1
        builder.end_document()
    builder.finalize(prefix + ".idx")


def main(command, *arguments):
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    if command == "available":
        return
    prefix, path = arguments
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if command == "read":
        read(IndexedDataset, prefix, content)
    elif command == "write":
        write(IndexedDatasetBuilder, prefix, content)
    else:
        sys.exit(f"unknown command {command}")


main(*sys.argv[1:])
