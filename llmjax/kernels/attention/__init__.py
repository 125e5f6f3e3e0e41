"""Attention of queries to keys under one mask: `mask`; in the plain form: `plain`; in bounded memory: `chunked`; as it is fast
on CPU: `blocked`; on TPU: `splash`. `choose` picks."""
