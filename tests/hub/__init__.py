"""A Hugging Face Hub for tests: real HTTP on this machine, with faults on demand. It knows what huggingface_hub asks for.

    from hub.server import HubServer

    with HubServer(tmp_path, xet=True) as hub:
        hub.fault(method="POST", path="/commit/", action="drop_after")  # the commit is made, its answer is lost
        ...  # a client, in a process whose HF_ENDPOINT is hub.url and whose HF_TOKEN is hf_write

No git server: a commit is a tree of names, a parent and a text. Contents lie on the disk under their hashes.
"""
