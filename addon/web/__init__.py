"""What users of mitmweb see: the page /access-log and the content view of a flow."""
