"""Refusals of S3, against moto with authentication: keys, signatures and policies are checked as AWS checks them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from builders import Cli, manifest_of
from s3servers import SECRET, moto_with_auth, settings, use

from modelstow.backends import AccessDenied
from modelstow.backends.conformance import TEN
from modelstow.backends.s3.client import S3Source

pytestmark = pytest.mark.slow

_FILES = (
    'files = [{ path = "ten", size = 10, sha256 = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882" }]'
)
_GET, _HEAD = "s3:GetObject", "s3:HeadObject"  # moto names the second, AWS counts it to the first


@dataclass(frozen=True)
class Users:
    """An S3 with one bucket, and pairs of keys by what their owner may do."""

    endpoint: str
    keys: dict[str, tuple[str, str]]

    def settings(self, name: str) -> dict[str, str]:
        return settings(self.endpoint, *self.keys[name])


_POLICIES = {"all": ["s3:*"], "list": ["s3:ListBucket"], "read": [_GET, _HEAD], "nothing": ["sqs:*"]}


def _client(service: str, endpoint: str) -> Any:
    return boto3.client(
        service, endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="root", aws_secret_access_key="root"
    )


@pytest.fixture(scope="module")
def users() -> Iterator[Users]:
    with pytest.MonkeyPatch.context() as patch:
        use(patch, {})
        with moto_with_auth(free=2 + 3 * len(_POLICIES)) as endpoint:
            s3, iam = _client("s3", endpoint), _client("iam", endpoint)
            s3.create_bucket(Bucket="models")
            s3.put_object(Bucket="models", Key="m/ten", Body=TEN)
            keys = {}
            for name, actions in _POLICIES.items():
                iam.create_user(UserName=name)
                policy = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": actions, "Resource": "*"}}
                iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
                key = iam.create_access_key(UserName=name)["AccessKey"]
                keys[name] = (key["AccessKeyId"], key["SecretAccessKey"])
            keys["unknown key"] = ("AKIANOBODY", SECRET)
            keys["wrong secret"] = (keys["all"][0], SECRET)
            yield Users(endpoint, keys)


def test_the_right_keys_are_let_in(users: Users, monkeypatch: pytest.MonkeyPatch):
    """Or every refusal below would prove nothing."""
    use(monkeypatch, users.settings("all"))
    source = S3Source()

    [listed] = source.listing("s3://models/m").files
    body = source.open("s3://models/m/ten")
    body.close()

    assert (listed.path, body.total, source.size("s3://models/m/ten")) == ("ten", 10, 10)


@pytest.mark.parametrize(
    ("who", "what", "reason", "hint"),
    [
        ("unknown key", "list", "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ("unknown key", "get", "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ("unknown key", "head", "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ("wrong secret", "list", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("wrong secret", "get", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("wrong secret", "head", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("nothing", "list", "AccessDenied", "s3:ListBucket"),
        ("nothing", "get", "AccessDenied", "s3:GetObject"),
        ("nothing", "head", "AccessDenied", "s3:GetObject"),
        ("read", "list", "AccessDenied", "s3:ListBucket"),
        ("list", "get", "AccessDenied", "s3:GetObject"),
    ],
)
def test_every_refusal_is_permanent_and_says_why(
    users: Users, monkeypatch: pytest.MonkeyPatch, who: str, what: str, reason: str, hint: str
):
    """HEAD too, whose answers have no body: GET is asked for the reason."""
    use(monkeypatch, users.settings(who))
    source = S3Source()
    ask = {"list": source.listing, "get": source.open, "head": source.size}[what]

    with pytest.raises(AccessDenied, match=reason) as caught:
        ask("s3://models/m" if what == "list" else "s3://models/m/ten")

    assert caught.value.code == "AUTH_FAIL" and not caught.value.transient
    assert hint in caught.value.hint
    assert users.keys[who][1] not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("who", ["unknown key", "wrong secret", "nothing", "list"])
@pytest.mark.parametrize("command", ["lock", "reconcile"])
def test_a_command_that_is_refused_exits_8_and_prints_no_secret(users: Users, cli: Cli, who: str, command: str):
    """Whichever command is refused and whatever output is chosen."""
    environ = users.settings(who)
    manifest = cli.folder / "models.toml"
    if command == "reconcile":
        manifest.write_text(manifest_of("s3://models/m", variant=_FILES))
        cli.ok("lock")
    else:
        manifest.write_text(manifest_of("s3://models/m"))

    plain = cli.run(command, "--verbose", **environ)
    ran = cli.run(command, "--json", **environ)

    assert (plain.code, ran.code, ran.json["error"]["code"]) == (8, 8, "AUTH_FAIL")
    assert "AWS_" in ran.json["error"]["hint"] or "s3:GetObject" in ran.json["error"]["hint"]
    assert not [text for text in (plain.out, plain.err, ran.out, ran.err) if users.keys[who][1] in text]
