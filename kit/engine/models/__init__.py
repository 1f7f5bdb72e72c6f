"""Models that SGLang lacks, as SGLang loads them: its package of external models.

nanochat.py        NanoChat, of Transformers' `NanoChatForCausalLM`
nanochat_2026.py   nanochat as its code has it since 14 March 2026
"""
