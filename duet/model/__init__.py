"""Language models.

loading        a name, a folder or a model -> one that can be trained
lm             hidden states at chosen positions, and the head
teacher        the frozen teacher
prefix_cache   prefixes that are read once
answers        a model's tokenizer, and the answers that it generates
adapters       adapters that are merged, and a new one; kept: an earlier one that stays; switches: off and on at every step
shrinking      the size of a trained adapter, changed after the training
hashes         of tokenizers and configurations; weights: of weights
"""
