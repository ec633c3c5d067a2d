"""Conversations with a model: `Conversation`, and the terminal that `unimoe chat` runs."""

from unimoe_model.chat.attachments import Attachment, attach, attach_read
from unimoe_model.chat.conversation import ContextFullError, Conversation
from unimoe_model.chat.sampling import Sampling

__all__ = ["Attachment", "ContextFullError", "Conversation", "Sampling", "attach", "attach_read"]
