"""What passes share: the contract, the pipeline and its text, the editor, the verifier."""
