"""Native Sparse Attention in the form that other projects call attention in.

Each module imports torch and nsa only: the project passes its own objects, of which the documented
attributes are read.

- :mod:`nsa.integrations.torchtitan`: the inner attention of a torchtitan model.
- :mod:`nsa.integrations.megatron`: the core attention of a Megatron layer.
"""
