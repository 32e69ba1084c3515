package cluster

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kraken/proto/config"
	"kraken/proto/registry"
)

// NameSigner signs the records and deletions of a build-index. A nil signer leaves them as they are.
type NameSigner struct{ key ed25519.PrivateKey }

// NameKeys are the public keys of the build-indexes whose records are believed. Without one every record is.
type NameKeys []ed25519.PublicKey

// signed returns the text that a signature covers: a name and version of the text, then every field with its length
// before it, 8 bytes big-endian.
func signed(what string, fields ...string) []byte {
	b := []byte(what + "\x00")
	for _, f := range fields {
		b = binary.BigEndian.AppendUint64(b, uint64(len(f)))
		b = append(b, f...)
	}
	return b
}

func (r NameRecord) signed() []byte {
	var sum []byte
	if len(r.Bytes) > 0 {
		s := sha256.Sum256(r.Bytes)
		sum = s[:]
	}
	return signed("kraken name record 1", fmt.Sprint(r.Version), r.Kind, r.Repository, r.Tag, r.Digest.String(), r.MediaType,
		fmt.Sprint(r.Size), string(sum), fmt.Sprint(r.Generation), r.Time.UTC().Format(time.RFC3339Nano))
}

func (d NameDeletion) signed() []byte {
	return signed("kraken name deletion 1", d.Repository, d.Key, fmt.Sprint(d.Generation))
}

// Sign returns the record with its signature.
func (s *NameSigner) Sign(r NameRecord) NameRecord {
	if s != nil {
		r.Signature = ed25519.Sign(s.key, r.signed())
	}
	return r
}

// Deletion returns what makes an origin forget the record of r's change, up to r's generation.
func (s *NameSigner) Deletion(r NameRecord) NameDeletion {
	d := NameDeletion{Repository: r.Repository, Key: NameKey(r), Generation: r.Generation}
	if s != nil {
		d.Signature = ed25519.Sign(s.key, d.signed())
	}
	return d
}

// Public returns the key that checks this signer's records.
func (s *NameSigner) Public() ed25519.PublicKey { return s.key.Public().(ed25519.PublicKey) }

// Verify returns nil when one of the keys made the record, or when there are no keys; registry.ErrDenied otherwise.
func (k NameKeys) Verify(r NameRecord) error { return k.verify("record", r.signed(), r.Signature) }

// VerifyDeletion returns nil when one of the keys made the deletion, or when there are no keys; registry.ErrDenied
// otherwise.
func (k NameKeys) VerifyDeletion(d NameDeletion) error {
	return k.verify("deletion", d.signed(), d.Signature)
}

func (k NameKeys) verify(what string, text, signature []byte) error {
	if len(k) == 0 || slices.ContainsFunc(k, func(p ed25519.PublicKey) bool { return ed25519.Verify(p, text, signature) }) {
		return nil
	}
	if len(signature) == 0 {
		return fmt.Errorf("%w: the %s is not signed", registry.ErrDenied, what)
	}
	return fmt.Errorf("%w: the %s is signed by none of the keys that are configured", registry.ErrDenied, what)
}

// ParseNameKeys reads configured keys: each is the 32 bytes of an Ed25519 public key in base64, or "file:" and the path
// of a PEM file with one or more of them.
func ParseNameKeys(list []string) (NameKeys, error) {
	var out NameKeys
	for i, s := range list {
		keys, err := parseNameKey(s)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
		out = append(out, keys...)
	}
	return out, nil
}

// ValidateNameKeys puts what ParseNameKeys refuses into m, below key.
func ValidateNameKeys(m *config.Mistakes, key string, list []string) {
	for i, s := range list {
		if _, err := parseNameKey(s); err != nil {
			m.Add(fmt.Sprintf("%s[%d]", key, i), "%w", err)
		}
	}
}

func parseNameKey(s string) (NameKeys, error) {
	file, ok := strings.CutPrefix(s, "file:")
	if !ok {
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil || len(b) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("%.60q: want %d bytes in base64, or file: and a path", s, ed25519.PublicKeySize)
		}
		return NameKeys{b}, nil
	}
	rest, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var out NameKeys
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		public, ok := key.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%s: a key is %T, want Ed25519", file, key)
		}
		out = append(out, public)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s has no PEM public key", file)
	}
	return out, nil
}

// OpenNameSigner returns a signer with the private key in file (PEM, PKCS #8, Ed25519). Where there is no file it makes
// one, readable by its owner alone, with the public half beside it as file.pub, and says so in made.
func OpenNameSigner(file string) (s *NameSigner, made bool, err error) {
	s, err = ReadNameSigner(file)
	if errors.Is(err, fs.ErrNotExist) {
		s, err = makeNameSigner(file)
		return s, true, err
	}
	return s, false, err
}

// ReadNameSigner is OpenNameSigner for a file that exists, fs.ErrNotExist where it does not.
func ReadNameSigner(file string) (*NameSigner, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s has no PEM private key", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: the key is %T, want Ed25519", file, key)
	}
	return &NameSigner{private}, nil
}

func makeNameSigner(file string) (*NameSigner, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	open, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	if err := writeKey(file+".pub", "PUBLIC KEY", open, 0o644); err != nil {
		return nil, err
	}
	return &NameSigner{private}, writeKey(file, "PRIVATE KEY", secret, 0o600)
}

// writeKey writes a PEM file, durably and whole or not at all.
func writeKey(file, kind string, der []byte, mode fs.FileMode) (err error) {
	f, err := os.OpenFile(file+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(file+".new", file); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
