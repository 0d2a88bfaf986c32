"""KVTC inside LMCache's multiprocess server: a serde, a sized L2 adapter, a server module.

    lmcache server ... --server-module '{"module_path": "kvtc_vllm.lmcache.server_module", ...}'

`kvtc config lmcache` prints the whole command. Only `serde`, `inner`, `sized_io`, `adapter` and
`server_module` import lmcache (0.5.6 or a later 0.5); the rest needs torch alone.
"""
