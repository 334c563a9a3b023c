"""Keys, the authority, certificates, tokens, folders and roles: what is good is good, and what is not is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import stat
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from commonweight.errors import AccessError, StorageError
from commonweight.identity import certificates, keys, roles
from commonweight.identity.authority import TARGET_NAME, Authority
from commonweight.identity.certificates import (
    holder_of,
    needs_renewal,
    new_request,
    new_tls_key,
    requested_key,
    verify_certificate,
)
from commonweight.identity.folder import IdentityFolder
from commonweight.identity.keys import AUDIT, ENROL, JOB, UPDATE, SigningKey, verify
from commonweight.identity.tokens import Token, check_address, hash_secret
from commonweight.wire.service import CONTROL, ENROLMENT, FEDERATION, TRANSFER

NOW = 1_790_000_000.0
HOUR = 3600.0
SIGNING = SigningKey.generate()
TLS_KEY = new_tls_key()
REQUEST = new_request(TLS_KEY)
SITE_URI = "commonweight://site/north"
KEY_URI = f"commonweight://signing-key/{SIGNING.public.hex()}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "authority"
    Authority.create(path, name="first", now=NOW)
    return path


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority.load(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another federation's, of the same name."""
    return Authority.create(tmp_path_factory.mktemp("other") / "authority", name="first", now=NOW)


def site(authority: Authority, **changes: Any) -> bytes:
    values: dict[str, Any] = {"name": "north", "role": "site", "signing_key": SIGNING.public, "now": NOW}
    return authority.issue(REQUEST, **{**values, **changes})


def forged(
    folder: Path,
    uris: Sequence[str] | None,
    *,
    key: Any = TLS_KEY,
    ca: bool = False,
    signs_certificates: bool = False,
    hours: float = 1,
    uses: Sequence[x509.ObjectIdentifier] | None = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    digital_signature: bool = True,
) -> bytes:
    """What the authority's own key could sign and its code would not."""
    issuer = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    begin = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "commonweight://site/south")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(hours=hours))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature, False, False, False, False, signs_certificates, False, False, False),
            critical=True,
        )
    )
    if uses is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=True)
    if uris is not None:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(names, critical=False)
    signer = load_pem_private_key((folder / "authority.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- keys


def test_a_signature_is_good_for_its_message_purpose_and_key_only() -> None:
    signature = SIGNING.sign(UPDATE, b"message")
    assert len(SIGNING.public) == 32
    assert verify(SIGNING.public, UPDATE, b"message", signature)
    assert not verify(SIGNING.public, UPDATE, b"messagE", signature)
    assert not verify(SIGNING.public, JOB, b"message", signature)
    assert not verify(SigningKey.generate().public, UPDATE, b"message", signature)
    assert not verify(SIGNING.public, UPDATE, b"message", signature[:-1] + bytes([signature[-1] ^ 1]))


def test_a_signature_is_plain_ed25519_over_the_domain_line_and_the_message() -> None:
    public = ed25519.Ed25519PublicKey.from_public_bytes(SIGNING.public)
    for domain, line in ((UPDATE, "update"), (JOB, "job"), (AUDIT, "audit"), (ENROL, "enrol")):
        public.verify(SIGNING.sign(domain, b"m"), f"commonweight {line} 1\n".encode() + b"m")


@pytest.mark.parametrize(
    ("public", "signature"),
    [(b"", b"x" * 64), (b"x" * 31, b"x" * 64), (SIGNING.public, b"")],
    ids=["empty", "short", "unsigned"],
)
def test_malformed_keys_and_signatures_are_false(public: bytes, signature: bytes) -> None:
    assert not verify(public, UPDATE, b"m", signature)


def test_a_purpose_of_ones_own_is_a_mistake_in_the_program() -> None:
    with pytest.raises(ValueError, match="no domain line"):
        SIGNING.sign(b"something\n", b"m")
    with pytest.raises(ValueError, match="no domain line"):
        verify(SIGNING.public, b"", b"m", b"x" * 64)


def test_a_signing_key_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    SIGNING.save(path)
    assert mode(path) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["signing.key"]
    assert SigningKey.load(path).public == SIGNING.public
    with pytest.raises(AccessError, match="exists already"):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).public == SIGNING.public


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o622, 0o601])
def test_a_key_that_others_may_use_is_refused_with_the_command_that_helps(tmp_path: Path, loose: int) -> None:
    path = tmp_path / "signing.key"
    SIGNING.save(path)
    path.chmod(loose)
    with pytest.raises(AccessError, match=f"{loose:04o}") as refused:
        SigningKey.load(path)
    assert f"chmod 600 {path}" in refused.value.hint
    path.chmod(0o400)
    assert SigningKey.load(path).public == SIGNING.public


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_key_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "signing.key"
    keys.write_private(path, content)
    with pytest.raises(AccessError, match="no private key"):
        SigningKey.load(path)


def test_keys_of_the_wrong_kind_missing_or_endless_are_refused(tmp_path: Path) -> None:
    certificates.save_tls_key(TLS_KEY, tmp_path / "tls.key")
    SIGNING.save(tmp_path / "signing.key")
    keys.write_private(tmp_path / "long.key", b"x" * 70_000)
    with pytest.raises(AccessError, match="no Ed25519 key"):
        SigningKey.load(tmp_path / "tls.key")
    with pytest.raises(AccessError, match="an Ed25519 key; TLS keys are ECDSA P-256"):
        certificates.load_tls_key(tmp_path / "signing.key")
    with pytest.raises(AccessError, match="is missing"):
        SigningKey.load(tmp_path / "none.key")
    with pytest.raises(AccessError, match="longer than any key"):
        SigningKey.load(tmp_path / "long.key")
    with pytest.raises(StorageError, match="cannot read"):
        SigningKey.load(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        SIGNING.save(tmp_path / "nowhere" / "signing.key")


def test_a_signing_key_is_neither_shown_nor_pickled() -> None:
    private = SIGNING._key.private_bytes_raw()
    assert private.hex() not in repr(SIGNING)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(SIGNING)


def test_a_folder_for_keys_admits_nobody_else(tmp_path: Path) -> None:
    keys.private_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a" / "b") == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(AccessError, match="0755") as refused:
        keys.private_folder(tmp_path / "open")
    assert f"chmod 700 {tmp_path / 'open'}" in refused.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        keys.private_folder(tmp_path / "file" / "b")


# ---- authority


def test_an_authority_is_a_p256_ca_that_can_make_no_other_ca(folder: Path, authority: Authority) -> None:
    certificate = x509.load_pem_x509_certificate(authority.certificate_pem)
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    key = certificate.public_key()
    assert (basic.value.ca, basic.value.path_length, basic.critical) == (True, 0, True)
    assert (usage.value.key_cert_sign, usage.value.digital_signature, usage.critical) == (True, False, True)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert certificate.not_valid_after_utc.year - certificate.not_valid_before_utc.year == 10
    assert (mode(folder), mode(folder / "authority.key")) == (0o700, 0o600)


def test_an_authority_is_never_made_over_another(folder: Path) -> None:
    before = (folder / "authority.pem").read_bytes()
    with pytest.raises(AccessError, match="already"):
        Authority.create(folder, name="second")
    assert (folder / "authority.pem").read_bytes() == before


def test_an_authority_whose_making_was_cut_can_be_made_again(tmp_path: Path) -> None:
    keys.private_folder(tmp_path / "authority")
    (tmp_path / "authority" / "authority.pem").write_text("cut")
    Authority.create(tmp_path / "authority", name="first")
    Authority.load(tmp_path / "authority")


def test_an_authority_is_opened_only_whole(tmp_path: Path, other: Authority) -> None:
    with pytest.raises(AccessError, match="is missing"):
        Authority.load(tmp_path)
    path = tmp_path / "authority"
    own = Authority.create(path, name="first", now=NOW)
    (path / "authority.pem").write_bytes(other.certificate_pem)
    with pytest.raises(AccessError, match="is not the certificate of"):
        Authority.load(path)
    (path / "authority.pem").write_bytes(site(own))
    with pytest.raises(AccessError, match="signs itself"):
        Authority.load(path)
    (path / "authority.pem").write_bytes(own.certificate_pem)
    (path / "authority.key").chmod(0o644)
    with pytest.raises(AccessError, match="others than its owner"):
        Authority.load(path)


@pytest.mark.parametrize("role", ["site", "lead", "admin", "auditor"])
def test_a_certificate_says_who_holds_it_and_serves_tls_clients_only(authority: Authority, role: str) -> None:
    pem = site(authority, role=role)
    certificate = x509.load_pem_x509_certificate(pem)
    holder = verify_certificate(pem, authority.certificate_pem, at=NOW)
    assert (holder.name, holder.role, holder.signing_key) == ("north", role, SIGNING.public)
    assert holder.serial == f"{certificate.serial_number:x}" == holder.serial.lower()
    assert holder.fingerprint == hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    assert (holder.not_before, holder.not_after) == (NOW - 300, NOW + 24 * HOUR)
    assert certificate.public_key() == TLS_KEY.public_key()
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert names.get_values_for_type(x509.DNSName) == []
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert holder == holder_of(pem)


def test_a_coordinators_certificate_serves_tls_servers_under_the_name_of_coordinators(authority: Authority) -> None:
    hosts = ["fed.example.org", "192.0.2.7", "2001:db8::1", "Fed.Example.Org", TARGET_NAME]
    pem = site(authority, role="coordinator", hosts=hosts)
    extensions = x509.load_pem_x509_certificate(pem).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uses = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(names.get_values_for_type(x509.DNSName)) == {TARGET_NAME, "fed.example.org"}
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["192.0.2.7", "2001:db8::1"]
    assert set(uses) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert verify_certificate(pem, authority.certificate_pem, at=NOW).role == "coordinator"


def test_two_certificates_have_different_serials_and_the_same_key(authority: Authority) -> None:
    first, second = (
        holder_of(site(authority)),
        holder_of(
            authority.issue(TLS_KEY.public_key(), name="north", role="site", signing_key=SIGNING.public, now=NOW)
        ),
    )
    assert first.serial != second.serial
    assert (first.name, first.role, first.not_after) == (second.name, second.role, second.not_after)


def test_what_a_request_says_of_itself_counts_for_nothing(authority: Authority) -> None:
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(TARGET_NAME), x509.UniformResourceIdentifier("commonweight://admin/root")]
            ),
            critical=False,
        )
        .sign(TLS_KEY, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    pem = authority.issue(greedy, name="north", role="site", signing_key=SIGNING.public, now=NOW)
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == [SITE_URI, KEY_URI]
    assert verify_certificate(pem, authority.certificate_pem, at=NOW).role == "site"
    assert b"admin" not in base64.b64decode(b"".join(pem.splitlines()[1:-1]))


def test_a_request_that_its_own_key_did_not_sign_is_refused(authority: Authority) -> None:
    point = TLS_KEY.public_key().public_numbers().x.to_bytes(32, "big")
    other_point = new_tls_key().public_key().public_numbers().x.to_bytes(32, "big")
    assert point in REQUEST
    for broken in (REQUEST[:-1] + bytes([REQUEST[-1] ^ 1]), REQUEST.replace(point, other_point)):
        with pytest.raises(AccessError, match=r"not signed by the key|cannot be read"):
            authority.issue(broken, name="north", role="site", signing_key=SIGNING.public)


@pytest.mark.parametrize("request_", [b"", b"junk", REQUEST[:-5], REQUEST + b"x", b"\x30" * 20_000], ids=range(5))
def test_a_request_that_cannot_be_read_is_refused(request_: bytes) -> None:
    with pytest.raises(AccessError, match="request"):
        requested_key(request_)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (rsa.generate_private_key(65537, 1024), "an RSA key of 1024 bits"),
        (ec.generate_private_key(ec.SECP384R1()), "secp384r1"),
        (ed25519.Ed25519PrivateKey.generate(), "an Ed25519 key"),
    ],
    ids=["rsa", "p384", "ed25519"],
)
def test_tls_keys_of_other_kinds_are_refused_by_name(authority: Authority, key: Any, kind: str, tmp_path: Path) -> None:
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, digest)
    for asked in (request.public_bytes(Encoding.DER), key.public_key()):
        with pytest.raises(AccessError, match=kind):
            authority.issue(asked, name="north", role="site", signing_key=SIGNING.public)
    keys.write_private(tmp_path / "tls.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(AccessError, match=kind):
        certificates.load_tls_key(tmp_path / "tls.key")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "North"}, "cannot be a name"),
        ({"name": "north/../lead"}, "cannot be a name"),
        ({"role": "root"}, "no role"),
        ({"role": "signing-key"}, "no role"),
        ({"signing_key": b"short"}, "no Ed25519"),
        ({"hours": 0}, "0 hours"),
        ({"hours": -1}, "-1 hours"),
        ({"hours": float("nan")}, "nan hours"),
        ({"hours": 1e9}, "hours"),
        ({"hosts": ["example.org"]}, "only a coordinator's"),
        ({"role": "coordinator", "hosts": [""]}, "neither a host name"),
        ({"role": "coordinator", "hosts": ["*.example.org"]}, "neither a host name"),
        ({"role": "coordinator", "hosts": ["example.org:8443"]}, "neither a host name"),
        ({"role": "coordinator", "hosts": ["https://example.org"]}, "neither a host name"),
        ({"role": "coordinator", "hosts": ["example.org\n"]}, "neither a host name"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}" for k in value),
)
def test_a_certificate_for_something_malformed_is_not_issued(
    authority: Authority, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(AccessError, match=said):
        site(authority, **changes)


def test_no_certificate_outlives_the_authority(authority: Authority) -> None:
    end = x509.load_pem_x509_certificate(authority.certificate_pem).not_valid_after_utc.timestamp()
    assert holder_of(site(authority, now=end - HOUR)).not_after == end
    with pytest.raises(AccessError, match="the authority itself expired"):
        site(authority, now=end)
    late = site(authority, now=end - HOUR)
    with pytest.raises(AccessError, match="expired"):
        verify_certificate(late, authority.certificate_pem, at=end + 1)


def test_nothing_is_good_after_the_authoritys_own_end(folder: Path, authority: Authority) -> None:
    endless = forged(folder, [SITE_URI, KEY_URI], hours=20 * 365 * 24)
    end = x509.load_pem_x509_certificate(authority.certificate_pem).not_valid_after_utc.timestamp()
    assert verify_certificate(endless, authority.certificate_pem, at=end).name == "north"
    with pytest.raises(AccessError, match="the authority's certificate expired"):
        verify_certificate(endless, authority.certificate_pem, at=end + 1)


@pytest.mark.parametrize(
    ("key", "ca", "path_length", "signs", "said"),
    [
        (ec.generate_private_key(ec.SECP256R1()), True, 0, True, None),
        (ec.generate_private_key(ec.SECP256R1()), True, None, True, "does not allow"),
        (ec.generate_private_key(ec.SECP256R1()), True, 1, True, "does not allow"),
        (ec.generate_private_key(ec.SECP256R1()), True, 0, False, "does not allow"),
        (ec.generate_private_key(ec.SECP256R1()), False, None, True, "does not allow"),
        (ec.generate_private_key(ec.SECP384R1()), True, 0, True, "secp384r1"),
    ],
    ids=["good", "any-depth", "deeper", "signs-nothing", "no-ca", "p384"],
)
def test_an_authority_signs_sites_and_users_and_no_other_authority(
    key: ec.EllipticCurvePrivateKey, ca: bool, path_length: int | None, signs: bool, said: str | None
) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
    begin = datetime.fromtimestamp(NOW, UTC)
    pem = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, signs, False, False, False), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    if said is None:
        assert certificates.authority_name(certificates.load_authority(pem)) == "root"
    else:
        with pytest.raises(AccessError, match=said):
            certificates.load_authority(pem)


# ---- certificates


@pytest.mark.parametrize(
    ("uris", "said"),
    [
        (None, "names 0 and 0"),
        ([], "names 0 and 0"),
        ([KEY_URI], "names 0 and 1"),
        ([SITE_URI], "names 1 and 0"),
        ([SITE_URI, "commonweight://lead/north", KEY_URI], "names 2 and 1"),
        ([SITE_URI, SITE_URI, KEY_URI], "names 2 and 1"),
        ([SITE_URI, KEY_URI, f"commonweight://signing-key/{'0' * 64}"], "names 1 and 2"),
        ([SITE_URI, KEY_URI.upper()], "not understood"),
        ([SITE_URI, KEY_URI[:-2]], "not understood"),
        (["commonweight://site/North", KEY_URI], "not understood"),
        (["commonweight://site/north/x", KEY_URI], "not understood"),
        (["commonweight://site/north\n", KEY_URI], "not understood"),
        (["commonweight://site/", KEY_URI], "not understood"),
        (["commonweight://root/north", KEY_URI], "not understood"),
        (["x-commonweight://site/north", KEY_URI], "not understood"),
        ([SITE_URI, KEY_URI, "https://example.org/"], "not understood"),
    ],
)
def test_a_certificate_names_exactly_one_holder_and_key(folder: Path, uris: list[str] | None, said: str) -> None:
    pem = forged(folder, uris)
    for read in (holder_of, lambda pem: verify_certificate(pem, (folder / "authority.pem").read_bytes())):
        with pytest.raises(AccessError, match=said):
            read(pem)


def test_the_subject_is_not_a_name(folder: Path) -> None:
    assert holder_of(forged(folder, [SITE_URI, KEY_URI])).name == "north"  # its subject says south


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"uses": None}, "does not say"),
        ({"uses": [ExtendedKeyUsageOID.SERVER_AUTH]}, "not for the use of a site"),
        ({"uses": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]}, "not for the use of a site"),
        ({"ca": True}, "not for the use of a site"),
        ({"signs_certificates": True}, "not for the use of a site"),
        ({"digital_signature": False}, "not for the use of a site"),
        ({"key": ec.generate_private_key(ec.SECP384R1())}, "secp384r1"),
    ],
    ids=["no-use", "server", "both", "ca", "signs", "no-signature", "p384"],
)
def test_a_certificate_for_another_use_is_refused(folder: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(AccessError, match=said):
        verify_certificate(forged(folder, [SITE_URI, KEY_URI], **how), (folder / "authority.pem").read_bytes(), at=NOW)


def test_another_authoritys_certificate_is_refused_even_under_the_same_name(
    authority: Authority, other: Authority
) -> None:
    with pytest.raises(AccessError, match="not issued by this authority"):
        verify_certificate(site(other), authority.certificate_pem, at=NOW)


def test_a_site_cannot_issue(tmp_path: Path, authority: Authority) -> None:
    """A site's own key signs what looks like a certificate of the authority's; and a site's certificate is no root."""
    fake = tmp_path / "fake"
    keys.private_folder(fake)
    certificates.save_tls_key(TLS_KEY, fake / "authority.key")
    (fake / "authority.pem").write_bytes(authority.certificate_pem)
    with pytest.raises(AccessError, match="not issued by this authority"):
        verify_certificate(forged(fake, [SITE_URI, KEY_URI], key=new_tls_key()), authority.certificate_pem)
    with pytest.raises(AccessError, match="signs itself"):
        verify_certificate(site(authority), site(authority))


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (NOW - 301, "good only from"),
        (NOW - 299, None),
        (NOW + 24 * HOUR, None),
        (NOW + 24 * HOUR + 1, "expired at"),
        (None, None),
    ],
)
def test_a_certificate_is_good_in_its_time(authority: Authority, at: float | None, said: str | None) -> None:
    pem = site(authority)
    if said is None:
        assert verify_certificate(pem, authority.certificate_pem, at=at).name == "north"
    else:
        with pytest.raises(AccessError, match=said):
            verify_certificate(pem, authority.certificate_pem, at=at)


def test_a_flipped_bit_anywhere_in_a_certificate_is_refused(authority: Authority) -> None:
    der = bytearray(x509.load_pem_x509_certificate(site(authority)).public_bytes(Encoding.DER))
    for at in range(0, len(der), 17):
        der[at] ^= 4
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
        with pytest.raises(AccessError):
            verify_certificate(pem, authority.certificate_pem, at=NOW)
        der[at] ^= 4


def test_what_is_not_one_certificate_is_refused(authority: Authority) -> None:
    pem = site(authority)
    for text, said in (
        (b"", "cannot be read"),
        (b"junk", "cannot be read"),
        (pem[:-80], "cannot be read"),
        (pem + pem, "there are 2"),
        (pem * 40, "longer than any"),
    ):
        with pytest.raises(AccessError, match=said):
            holder_of(text)
        with pytest.raises(AccessError, match=said):
            verify_certificate(pem, text)


def test_a_certificate_is_renewed_in_the_last_third_of_its_life(authority: Authority) -> None:
    holder = replace(holder_of(site(authority)), not_before=1000.0, not_after=1300.0)
    assert [needs_renewal(holder, now) for now in (1000, 1199, 1200, 1201, 1300, 2000)] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


# ---- tokens


@pytest.fixture(scope="module")
def token(authority: Authority) -> Token:
    return make_token(authority)


def make_token(authority: Authority, **changes: Any) -> Token:
    values: dict[str, Any] = {
        "name": "north",
        "role": "site",
        "address": "fed.example.org:8443",
        "enrolment": "[2001:db8::1]:8444",
        "authority_pem": authority.certificate_pem,
        "now": NOW,
    }
    return Token.make(**{**values, **changes})


def packed(values: Any, *, check: bool = True) -> str:
    """A token's text made by hand, with a `check` that fits."""
    if check:
        body = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        values = {**values, "check": hashlib.sha256(body).hexdigest()[:16]}
    return "cw1." + base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


def test_a_token_survives_its_text_and_the_mail(token: Token) -> None:
    text = token.to_text()
    wrapped = "  " + "\r\n".join(text[at : at + 60] for at in range(0, len(text), 60)) + "\n"
    assert text.isascii()
    assert not set(text) & set(" \n=+/")
    assert Token.from_text(text) == Token.from_text(wrapped) == token
    assert Token.from_text(packed(token.model_dump())) == token


def test_a_secret_is_random_and_only_its_hash_is_kept(authority: Authority, token: Token) -> None:
    assert len(base64.urlsafe_b64decode(token.secret + "=")) == 32
    assert token.secret != make_token(authority).secret
    assert token.secret_hash == hash_secret(token.secret) == hashlib.sha256(token.secret.encode()).hexdigest()
    assert token.secret not in repr(token) + str(token)


def test_a_changed_or_cut_token_is_refused_without_showing_it(token: Token) -> None:
    text = token.to_text()
    changed = [text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :] for at in range(0, len(text) - 1, 7)]
    cut = [text[:at] for at in (0, 3, 4, 5, 100, len(text) // 2, len(text) - 5, len(text) - 2)]
    for broken in (*changed, *cut, text + "AAAA", text[10:], text[:50] + text[51:]):
        with pytest.raises(AccessError) as refused:
            Token.from_text(broken)
        assert token.secret not in refused.value.message + refused.value.hint


@pytest.mark.parametrize("text", ["", "cw1.", "cw2.AAAA", "cw1.é", "cw1." + "A" * 20_000, "cw1.bnVsbA", "cw1.W10"])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(AccessError):
        Token.from_text(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../north"},
        {"name": None},
        {"role": "coordinator"},
        {"role": "root"},
        {"secret": "not-so-short-a-secret"},
        {"secret": "!" * 43},
        {"secret": "A" * 43 + "\n"},
        {"address": "fed.example.org"},
        {"enrolment": "http://fed.example.org:1"},
        {"authority": "junk"},
        {"authority": 5},
        {"expires_at": "soon"},
        {"expires_at": -1.0},
        {"expires_at": float("inf")},
        {"more": 1},
    ],
    ids=lambda changes: "-".join(f"{k}={str(v)[:12]!a}" for k, v in changes.items()),
)
def test_a_token_with_a_malformed_field_is_refused(token: Token, changes: dict[str, Any]) -> None:
    with pytest.raises(AccessError) as refused:
        Token.from_text(packed({**token.model_dump(), **changes}))
    shown = "".join(traceback.format_exception(refused.value))
    assert token.secret not in shown
    assert "not-so-short-a-secret" not in shown


def test_a_token_without_a_field_or_its_check_is_refused(token: Token) -> None:
    for name in Token.model_fields:
        with pytest.raises(AccessError, match=name):
            Token.from_text(packed({k: v for k, v in token.model_dump().items() if k != name}))
    with pytest.raises(AccessError, match="was changed"):
        Token.from_text(packed(token.model_dump(), check=False))


def test_a_sites_certificate_is_no_authority_in_a_token(authority: Authority) -> None:
    with pytest.raises(AccessError, match="signs itself"):
        make_token(authority, authority_pem=site(authority))


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 1e6])
def test_a_token_is_for_a_time(authority: Authority, hours: float) -> None:
    with pytest.raises(AccessError, match="hours"):
        make_token(authority, hours=hours)


def test_a_token_expires(token: Token) -> None:
    token.check_time(NOW + 24 * HOUR - 1)
    with pytest.raises(AccessError, match="expired"):
        token.check_time(NOW + 24 * HOUR)


@pytest.mark.parametrize("address", ["a:1", "fed.example.org:65535", "127.0.0.1:8443", "[::1]:80"])
def test_addresses_have_a_host_and_a_port(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address", ["", "a", "a:", ":1", "a:0", "a:65536", "::1:80", "a b:1", "a:1\n", "a:1/x", "dns:///a:1", "a:١"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(AccessError, match="no address"):
        check_address(address)


# ---- folders


def enrolled(authority: Authority, path: Path, **changes: Any) -> IdentityFolder:
    asked = IdentityFolder.prepare(path)
    assert verify(asked.signing_key, ENROL, asked.csr, asked.possession)
    values: dict[str, Any] = {"name": "north", "role": "site", "signing_key": asked.signing_key, "now": NOW}
    certificate = authority.issue(asked.csr, **{**values, **changes})
    return IdentityFolder.complete(
        path,
        name=values["name"],
        role=values["role"],
        certificate=certificate,
        authority=authority.certificate_pem,
        address="fed.example.org:8443",
    )


def test_joining_makes_a_folder_that_is_the_identity(tmp_path: Path, authority: Authority) -> None:
    path = tmp_path / "identity"
    joined = enrolled(authority, path)
    opened = IdentityFolder.open(path, at=NOW)
    assert opened.holder == joined.holder == holder_of(opened.certificate)
    assert (opened.holder.name, opened.holder.role, opened.address) == ("north", "site", "fed.example.org:8443")
    assert opened.signing_key.public == opened.holder.signing_key
    assert opened.authority == authority.certificate_pem
    assert json.loads((path / "identity.json").read_text())["address"] == opened.address
    assert sorted(entry.name for entry in path.iterdir()) == [
        "authority.pem",
        "identity.json",
        "signing.key",
        "tls.key",
        "tls.pem",
    ]
    assert [mode(path), mode(path / "tls.key"), mode(path / "signing.key")] == [0o700, 0o600, 0o600]
    assert b"PRIVATE" not in repr(opened).encode()


def test_joining_may_be_cut_and_repeated_with_the_same_keys(tmp_path: Path, authority: Authority) -> None:
    path = tmp_path / "identity"
    first, second = IdentityFolder.prepare(path), IdentityFolder.prepare(path)
    assert first.signing_key == second.signing_key
    assert requested_key(first.csr) == requested_key(second.csr)
    with pytest.raises(AccessError, match="no identity that has been enrolled"):
        IdentityFolder.open(path)
    enrolled(authority, path)
    with pytest.raises(AccessError, match="enrolled already"):
        IdentityFolder.prepare(path)


def test_joining_over_a_damaged_key_or_in_an_open_folder_is_refused(tmp_path: Path) -> None:
    IdentityFolder.prepare(tmp_path / "a")
    (tmp_path / "a" / "tls.key").write_bytes(b"")
    with pytest.raises(AccessError, match="no private key"):
        IdentityFolder.prepare(tmp_path / "a")
    (tmp_path / "b").mkdir(mode=0o755)
    with pytest.raises(AccessError, match="others than its owner"):
        IdentityFolder.prepare(tmp_path / "b")


def test_what_comes_back_from_enrolment_must_be_for_this_folder(
    tmp_path: Path, authority: Authority, other: Authority
) -> None:
    path = tmp_path / "identity"
    asked = IdentityFolder.prepare(path)
    good: dict[str, Any] = {
        "name": "north",
        "role": "site",
        "authority": authority.certificate_pem,
        "address": "fed.example.org:8443",
        "certificate": authority.issue(asked.csr, name="north", role="site", signing_key=asked.signing_key, now=NOW),
    }
    stranger = authority.issue(asked.csr, name="north", role="site", signing_key=SIGNING.public, now=NOW)
    for changes, said in (
        ({"certificate": site(authority)}, "not for the TLS key"),
        ({"certificate": stranger}, "another signing key"),
        ({"name": "south"}, "not of site south"),
        ({"role": "lead"}, "not of lead north"),
        ({"authority": other.certificate_pem}, "not issued by this authority"),
        ({"address": "nowhere"}, "no address"),
    ):
        with pytest.raises(AccessError, match=said):
            IdentityFolder.complete(path, **{**good, **changes})
        assert sorted(entry.name for entry in path.iterdir()) == ["signing.key", "tls.key"]
    assert IdentityFolder.complete(path, **good).holder.name == "north"
    with pytest.raises(AccessError, match="is missing"):
        IdentityFolder.complete(tmp_path / "unprepared", **good)


def test_a_folder_is_opened_only_whole(tmp_path: Path, authority: Authority, other: Authority) -> None:
    path = tmp_path / "identity"
    enrolled(authority, path)
    for name, content, said in (
        ("tls.key", None, "is missing"),
        ("signing.key", None, "is missing"),
        ("authority.pem", None, "is missing"),
        ("identity.json", None, "is missing"),
        ("tls.pem", None, "no identity that has been enrolled"),
        ("tls.pem", b"junk", "cannot be read"),
        ("tls.pem", site(authority), "not for the TLS key"),
        ("tls.key", keys.private_pem(new_tls_key()), "not for the TLS key"),
        ("signing.key", keys.private_pem(ed25519.Ed25519PrivateKey.generate()), "another signing key"),
        ("authority.pem", other.certificate_pem, "not issued by this authority"),
        ("identity.json", b"{}", "not well formed"),
        ("identity.json", b"\xff", "not well formed"),
        ("identity.json", b'{"name": "south", "role": "site", "address": "a:1"}', "not of site south"),
        ("identity.json", b'{"name": "north", "role": "site", "address": "a"}', "no address"),
        ("identity.json", b'{"name": "north", "role": "site", "address": "a:1", "x": 1}', "x: Extra"),
    ):
        before = (path / name).read_bytes()
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
            (path / name).chmod(0o600)
        with pytest.raises(AccessError, match=said):
            IdentityFolder.open(path)
        (path / name).unlink(missing_ok=True)
        (path / name).write_bytes(before)
        (path / name).chmod(0o600)
    assert IdentityFolder.open(path).holder.name == "north"
    with pytest.raises(AccessError, match="no identity that has been enrolled"):
        IdentityFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tls.key", "signing.key"])
def test_a_folder_with_an_open_key_is_refused_with_the_command_that_helps(
    tmp_path: Path, authority: Authority, name: str
) -> None:
    enrolled(authority, tmp_path / "identity")
    (tmp_path / "identity" / name).chmod(0o644)
    with pytest.raises(AccessError) as refused:
        IdentityFolder.open(tmp_path / "identity")
    assert f"chmod 600 {tmp_path / 'identity' / name}" in refused.value.hint


def test_an_expired_identity_opens_only_to_be_looked_at(tmp_path: Path, authority: Authority) -> None:
    enrolled(authority, tmp_path / "identity")
    late = NOW + 48 * HOUR
    assert needs_renewal(IdentityFolder.open(tmp_path / "identity").holder, late)
    with pytest.raises(AccessError, match="expired at"):
        IdentityFolder.open(tmp_path / "identity", at=late)


def test_a_renewed_certificate_takes_the_old_ones_place(tmp_path: Path, authority: Authority) -> None:
    old = enrolled(authority, tmp_path / "identity")
    pem = authority.issue(
        old.request(), name="north", role="site", signing_key=old.holder.signing_key, now=NOW + 20 * HOUR
    )
    new = old.write_certificate(pem)
    assert new.certificate == IdentityFolder.open(tmp_path / "identity", at=NOW + 40 * HOUR).certificate == pem
    assert new.holder.not_after == NOW + 44 * HOUR
    assert new.holder.serial != old.holder.serial
    assert new.tls_key == old.tls_key


def test_a_certificate_that_is_not_for_the_folder_leaves_the_old_one(
    tmp_path: Path, authority: Authority, other: Authority
) -> None:
    identity = enrolled(authority, tmp_path / "identity")
    own = {"signing_key": identity.holder.signing_key, "now": NOW}
    for pem, said in (
        (b"", "cannot be read"),
        (site(authority), "not for the TLS key"),
        (authority.issue(identity.request(), name="north", role="lead", **own), "is of lead north"),
        (authority.issue(identity.request(), name="south", role="site", **own), "is of site south"),
        (other.issue(identity.request(), name="north", role="site", **own), "not issued by this authority"),
    ):
        with pytest.raises(AccessError, match=said):
            identity.write_certificate(pem)
    assert IdentityFolder.open(tmp_path / "identity").certificate == identity.certificate


# ---- roles and names


def test_every_method_of_the_wire_is_in_the_table_and_none_besides() -> None:
    methods = [*FEDERATION.values(), *TRANSFER.values(), *CONTROL.values()]
    assert {method.path.removeprefix("/commonweight.v1.") for method in methods} == set(roles.MAY)
    for method in methods:
        callers = {role for role in roles.ROLES if roles.may(role, method.path)}
        assert callers, f"nobody may call {method.path}"
        assert callers == roles.MAY[method.path.removeprefix("/commonweight.v1.")]
    assert not any(roles.may(role, ENROLMENT["Enrol"].path) for role in roles.ROLES)


def test_sites_cannot_command_and_auditors_change_nothing() -> None:
    may_do = {role: {method for method in roles.MAY if roles.may(role, method)} for role in roles.ROLES}
    assert not any(method.startswith("Control/") for method in may_do["site"])
    assert not any(method.startswith("Federation/") for role in ("lead", "admin", "auditor") for method in may_do[role])
    assert not may_do["auditor"] & {"Control/Submit", "Control/Cancel", "Transfer/Push"}
    assert [role for role in roles.ROLES if "Control/Submit" in may_do[role]] == ["lead"]
    assert may_do["coordinator"] == set()
    assert not any(method.startswith("Control/") for method in may_do["relay"])
    assert may_do["relay"] - may_do["site"] == {"Federation/OpenPartial", "Federation/Region"}
    of_sites_alone = {"Federation/OpenAhead", "Federation/OpenUpload", "Federation/CatchUp", "Transfer/Fetch"}
    assert may_do["site"] - may_do["relay"] == of_sites_alone


@pytest.mark.parametrize(
    ("role", "method"),
    [
        ("root", "Control/ListRuns"),
        ("", "Control/ListRuns"),
        ("lead", "Submit"),
        ("lead", ""),
        ("lead", "/other.v1.Control/Submit"),
        ("lead", "//commonweight.v1.Control/Submit"),
        ("lead", "Control/submit"),
        ("lead", "Control/Shutdown"),
    ],
)
def test_what_the_table_does_not_name_is_refused(role: str, method: str) -> None:
    assert not roles.may(role, method)


def test_the_table_reads_well_in_the_docs() -> None:
    lines = roles.markdown().splitlines()
    assert lines[0] == "| method | site | relay | lead | admin | auditor |"
    assert len(lines) == len(roles.MAY) + 2
    assert "| `Control/Submit` |  |  | yes |  |  |" in lines
    assert set(roles.MEANING) == set(roles.ROLES)


@pytest.mark.parametrize("name", ["a", "0", "clinic-north", "a.b_c-d", "a" * 63])
def test_names(name: str) -> None:
    assert roles.check_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "..", "a/b", "a b", "a\n", "é", "a\x00", "a" * 64, "a" * 9000])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(AccessError, match="cannot be a name") as refused:
        roles.check_name(name)
    assert len(refused.value.message) < 450


def test_roles() -> None:
    assert [roles.check_role(role) for role in roles.ROLES] == list(roles.ROLES)
    with pytest.raises(AccessError, match="no role"):
        roles.check_role("Site")
