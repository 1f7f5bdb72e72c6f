"""Models that SGLang lacks, as SGLang loads them: its package of external models.

nanochat.py   NanoChat, of Transformers' `NanoChatForCausalLM`
"""
