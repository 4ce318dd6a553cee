"""A model repo on the Hub: for each checkpoint a revision, which never changes, and the export on `main`.

huggingface_hub finds the token itself at each request. This module does not read it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.recipe.hub import NotPushableError

_COMMIT_MESSAGE = "Upload from hfpretrain"


class Repo:
    """A model repo, created by the first call that needs it.

    Methods raise the errors of huggingface_hub; `recipe.hub.explain_failure` says what they mean.
    """

    def __init__(self, repo_id: str, private: bool):
        from huggingface_hub import HfApi

        self._api, self._requested_id, self._private = HfApi(), repo_id, private
        self._repo_id: str | None = None

    def open(self) -> str:
        """Create the repo if it does not exist, and return its full name."""
        if self._repo_id is None:
            self._repo_id = self._api.create_repo(self._requested_id, private=self._private, exist_ok=True).repo_id
        return self._repo_id

    def tags(self) -> set[str]:
        """Names of the complete revisions: a revision gets its tag last."""
        return set(self._refs()[0])

    def revision_commit(self, name: str, title: str, required_file: str) -> str | None:
        """The commit of the revision `name`, None if it is missing or incomplete.

        A revision is never replaced: raises `NotPushableError` if its commit has another title or lacks
        `required_file`.
        """
        tags, branches = self._refs()
        if name in tags or name in branches:
            commit = tags.get(name) or branches[name]
            (newest, *older) = self._api.list_repo_commits(self.open(), revision=commit)
            wrong = None
            if newest.title != title and (name in tags or older):  # a branch with one commit is new
                wrong = f"another {name} ({newest.title!r})"
            elif name in tags and not self._api.file_exists(self.open(), required_file, revision=commit):
                wrong = f"{name} without {required_file}"
            if wrong is not None:
                raise NotPushableError(f"{self.open()} has {wrong}; push to another repo")
            return commit if name in tags else None
        return None

    def push_revision(self, name: str, title: str, description: str, files: Mapping[str, Path]) -> str:
        """Push `files`, by their path in the repo, as one commit on a branch `name` with a tag `name`.

        If a call was interrupted, another call does the rest. The branch starts at the repo's first commit, so it has
        no files of `main`. Branch and tag point to the same commit, so it does not matter which of them
        `from_pretrained(revision=name)` uses. Returns the commit.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        repo_id, (_, branches) = self.open(), self._refs()
        if name not in branches:
            first = self._api.list_repo_commits(repo_id)[-1].commit_id
            self._api.create_branch(repo_id, branch=name, revision=first, exist_ok=True)
        (newest, *_) = self._api.list_repo_commits(repo_id, revision=branches.get(name, name))
        commit = str(newest.commit_id)
        if newest.title != title:
            operations = [CommitOperationAdd(path, local) for path, local in sorted(files.items())]
            keywords: dict[str, Any] = {"revision": name, "commit_description": description}
            commit = self._api.create_commit(repo_id, operations, commit_message=title, **keywords).oid
        try:
            self._api.create_tag(repo_id, tag=name, revision=commit, tag_message=title)
        except HfHubHTTPError as error:
            # 409: the name exists. An earlier request may have created the tag although its response was lost. A server
            # may also answer 409 because of the branch of the same name.
            if error.response.status_code != 409 or self._refs()[0].get(name, commit) != commit:
                raise
        return commit

    def push_main(self, folder: Path) -> str:
        """Upload an exported folder to `main`, and delete files there of an earlier export that the folder lacks.

        Returns the newest commit. Raises `NotPushableError` if a file of the export is damaged.
        """
        from safetensors import SafetensorError, safe_open

        repo_id = self.open()
        if (reason := files.sums_damage(folder)) is not None:
            raise NotPushableError(reason)
        for path in folder.glob("*.safetensors"):
            try:
                with safe_open(path, framework="np"):
                    pass
            except SafetensorError as error:
                raise NotPushableError(f"{path} is damaged: {error}") from error
        old = [glob.escape(name) for name in self._exported_files() if not (folder / name).is_file()]
        keywords: dict[str, Any] = {"delete_patterns": old, "ignore_patterns": [f"*{files.INCOMPLETE}"]}
        return str(
            self._api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=_COMMIT_MESSAGE, **keywords).oid
        )

    def _exported_files(self) -> list[str]:
        """Files of an earlier export on `main`: those in its SHA256SUMS; without that file, only the weights."""
        names = self._api.list_repo_files(self.open())
        if files.SUMS in names:
            path = Path(self._api.hf_hub_download(self.open(), files.SUMS, force_download=True))
            try:
                return [name for name in files.sums_of(path.parent) or {} if name in names]
            except ValueError:
                return []
        return [name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]

    def card_text(self) -> str | None:
        """The text of the card on `main`, None if there is no card."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = self._api.hf_hub_download(self.open(), "README.md", force_download=True)
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")

    def _refs(self) -> tuple[dict[str, str], dict[str, str]]:
        refs = self._api.list_repo_refs(self.open())
        tags, branches = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.tags, refs.branches))
        return tags, branches
