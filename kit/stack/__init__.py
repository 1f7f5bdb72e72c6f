"""The processes under a session: Ray head, SGLang engine, FSDP2 trainer."""
