"""Whole documents packed into rows of one length, with the ids that keep their attentions apart.

The documents, each followed by the end token, form one line that is cut into rows. `document_BT` says which document
a token belongs to; a token may attend to another one where the ids are equal, so a row that holds two documents
trains both as if each were alone. A document that is longer than the rest of its row goes on in the next one, under
the same id, without sight of its beginning.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.errors import LabError

PADDING = -1


def pack_documents(documents: Sequence[Tensor], length: int, end: int) -> tuple[Tensor, Tensor]:
    """Token rows [B, length] and document ids [B, length], both LongTensor.

    Ids count the documents from 0 in their order; an end token has its document's id. What is left of the last row is
    filled with `end` under the id PADDING (-1): leave those positions out of the loss. Raises LabError without
    documents or with a length below 1.
    """
    if not documents or length < 1:
        raise LabError(f"{len(documents)} documents can't be packed into rows of {length}.",
                       "Give at least one document and a length of 1 or more.")
    stop = torch.tensor([end])
    token_M = torch.cat([part for document in documents for part in (document.long().cpu(), stop)])
    sizes = torch.tensor([len(document) + 1 for document in documents])
    document_M = torch.repeat_interleave(torch.arange(len(documents)), sizes)
    spare = -len(token_M) % length
    token_M = torch.cat([token_M, token_M.new_full((spare,), end)])
    document_M = torch.cat([document_M, document_M.new_full((spare,), PADDING)])
    return token_M.view(-1, length), document_M.view(-1, length)
