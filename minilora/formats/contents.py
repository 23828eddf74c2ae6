"""What a file is that should be something else, by its first bytes, and what to do about it."""

from __future__ import annotations

HEAD_BYTES = 512  # that `describe_content` looks at

LFS = "a git-lfs pointer, not the file that it stands for: run `git lfs pull`, or download the file"
PAGE = "an HTML page, saved in place of the file: download the file itself, logged in if need be"
ERROR = "a server's message, saved in place of the file: check the address, and download it again"
PICKLE = "a pickle, as torch.save writes it: save the tensors with safetensors instead"
ZIP = f"a zip archive, or {PICKLE}"
GGUF = "a GGUF file, llama.cpp's format: get the model in safetensors"
UNPACK = "a compressed file: unpack it first"
SAFETENSORS = "a safetensors file: it has the name of another"

# By how the content begins, after white space and in lower case.
TEXTS = {
    b"version https://git-lfs": LFS,
    b"<!doctype html": PAGE,
    b"<html": PAGE,
    b"<?xml": PAGE,
    b"entry not found": ERROR,
    b"repository not found": ERROR,
    b"invalid username or password": ERROR,
    b"access to model": ERROR,
    b"not found": ERROR,
}
# By how the content begins, exactly.
MAGIC = {
    b"PK\x03\x04": ZIP,
    b"\x80\x02": PICKLE,
    b"\x80\x03": PICKLE,
    b"\x80\x04": PICKLE,
    b"\x80\x05": PICKLE,
    b"GGUF": GGUF,
    b"\x93NUMPY": "a NumPy array (.npy): save the tensors with safetensors instead",
    b"\x89HDF\r\n": "an HDF5 file: save the tensors with safetensors instead",
    b"\x1f\x8b": UNPACK,
    b"\x28\xb5\x2f\xfd": UNPACK,
    b"BZh": UNPACK,
    b"\xfd7zXZ": UNPACK,
}


def describe_content(head: bytes) -> str | None:
    """What a file with this beginning is, and what to do; None if it is none of these."""
    head = head[:HEAD_BYTES]
    text = head.lstrip().lower()
    if not head:
        return "empty: download it again, or save it again"
    if not head.strip(b"\0"):
        return "zeros, as an interrupted download leaves them: download it again"
    for kinds, content in ((TEXTS, text), (MAGIC, head)):
        for start, kind in kinds.items():
            if content.startswith(start):
                return kind
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    return None
