package proxy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/config"
	"kraken/proto/registry"
)

const someUUID = "0b7a1d52-7b0e-4b3b-9a43-0a4d5b6c7d8e"

func newSigner(keys ...string) signer {
	var all [][]byte
	for _, k := range keys {
		all = append(all, []byte(k))
	}
	return signer{func() [][]byte { return all }}
}

func TestSessionIDs(t *testing.T) {
	mine, other := newSigner("one key"), newSigner("another key")
	good := session{V: sessionVersion, Repo: "a", S: []part{{"origin-01", someUUID}, {"origin-02", someUUID}}}
	if got, err := mine.unseal(mine.seal(good)); err != nil || got.Repo != "a" || len(got.S) != 2 || got.S[1] != good.S[1] {
		t.Errorf("%+v, %v", got, err)
	}
	raw := func(b string) string {
		return base64.RawURLEncoding.EncodeToString(append(mac([]byte("one key"), []byte(b)), b...))
	}
	text, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	unsigned := base64.RawURLEncoding.EncodeToString(append(make([]byte, 32), text...))
	with := func(change func(*session)) string {
		s := good
		s.S = append([]part{}, good.S...)
		change(&s)
		return mine.seal(s)
	}
	sealed := mine.seal(good)
	for name, id := range map[string]string{
		"empty": "", "no base64": "x", "no signature": "e30", "only a signature": base64.RawURLEncoding.EncodeToString(make([]byte, 32)),
		"the first version": base64.RawURLEncoding.EncodeToString([]byte(`{"v":1,"r":"a","s":[{"o":"origin-01","u":"x"}]}`)),
		"signed by nobody":  unsigned, "another key": other.seal(good), "a changed bit": sealed[:len(sealed)-9] + "AAAAAAAAA",
		"another repository": with(func(s *session) { s.Repo = "b" }), "no repository": with(func(s *session) { s.Repo = "" }),
		"a later version": with(func(s *session) { s.V++ }), "no origin": with(func(s *session) { s.S = nil }),
		"too many":       with(func(s *session) { s.S = append(append(s.S, s.S...), s.S...) }),
		"a path":         with(func(s *session) { s.S[0].Upload = "_kraken/names/x" }),
		"an empty id":    with(func(s *session) { s.S[1].Upload = "" }),
		"another UUID":   with(func(s *session) { s.S[0].Upload = strings.ToUpper(someUUID) }),
		"a UUID in urn":  with(func(s *session) { s.S[0].Upload = "urn:uuid:" + someUUID }),
		"an unknown key": raw(strings.Replace(string(text), "{", `{"x":1,`, 1)), "data after it": raw(string(text) + " "),
		"a second document": raw(string(text) + "{}"), "a key twice": raw(strings.Replace(string(text), "{", `{"v":2,`, 1)),
		"another case": raw(strings.Replace(string(text), `"r"`, `"R"`, 1)), "too long": strings.Repeat("A", maxSessionID+1), "padding": sealed + "==",
	} {
		p := &Proxy{ids: mine}
		if _, err := p.open("a", id); !errors.Is(err, registry.ErrBlobUploadUnknown) || !errors.Is(err, errSession) {
			t.Errorf("%s: %v, want ErrBlobUploadUnknown", name, err)
		}
	}
}

// An id that was changed is told apart by its signature, before anything in it is read: the answer says so, whichever
// byte it is.
func TestChangedSessionID(t *testing.T) {
	s := newSigner("one key")
	id := s.seal(session{V: sessionVersion, Repo: "a", S: []part{{"origin-01", someUUID}}})
	for i := range len(id) - 1 { // the last character has bits that base64 does not allow
		b := []byte(id)
		if b[i]++; b[i] > 'z' || b[i] == '[' || b[i] == ':' || b[i] == '.' || b[i] == '`' {
			b[i] = 'A'
		}
		if string(b) == id {
			continue
		}
		_, err := s.unseal(string(b))
		if !errors.Is(err, errSession) || !strings.Contains(err.Error(), "begin a new upload") {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
}

func FuzzSessionID(f *testing.F) {
	s := newSigner("one key")
	f.Add(s.seal(session{V: sessionVersion, Repo: "other", S: []part{{"o", someUUID}}}))
	f.Add(base64.RawURLEncoding.EncodeToString([]byte(`{"v":1,"r":"a","s":[{"o":"origin-01","u":"x"}]}`)))
	f.Fuzz(func(t *testing.T, id string) {
		sum, b, err := splitID(id)
		if err != nil {
			return
		}
		v, err := parseSession(b)
		if err != nil {
			return
		}
		if again := base64.RawURLEncoding.EncodeToString(append(bytes.Clone(sum), b...)); again != id {
			t.Errorf("%q is also written %q", id, again)
		}
		for _, p := range v.S {
			if len(p.Upload) != len(someUUID) || strings.ContainsAny(p.Upload, "/.?#%") {
				t.Errorf("%q: session %q", id, p.Upload)
			}
		}
		if again := s.seal(v); again != id {
			if _, err := s.unseal(id); err == nil {
				t.Errorf("%q was taken, and is not how %+v is written", id, v)
			}
		}
	})
}

// All proxies that share a file have one key, also when they make it at the same moment.
func TestKeyIsMadeOnce(t *testing.T) {
	name := filepath.Join(t.TempDir(), "upload.key")
	keys := make([][]byte, 8)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			k, _, err := uploadKeys(Config{UploadKeyFile: name}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			keys[i] = k()[0]
		})
	}
	wg.Wait()
	for _, k := range keys {
		if len(k) < minKey || !bytes.Equal(k, keys[0]) {
			t.Errorf("keys %q and %q", k, keys[0])
		}
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v, want 0600", fi.Mode(), err)
	}
	if left, err := filepath.Glob(name + ".*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := os.WriteFile(name, []byte("short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := uploadKeys(Config{UploadKeyFile: name}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a short key was taken")
	}
}

func TestKeyOfTheProcess(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, nil))
	one, _, err := uploadKeys(Config{}, log)
	other, _, err2 := uploadKeys(Config{}, log)
	if errors.Join(err, err2) != nil || bytes.Equal(one()[0], other()[0]) || !strings.Contains(b.String(), "nor after a restart") {
		t.Errorf("%q, %q: %v, %v, log %s", one(), other(), err, err2, &b)
	}
	key := strings.Repeat("x", minKey)
	k, _, err := uploadKeys(Config{UploadKey: config.NewSecret(key)}, log)
	if err != nil || len(k()) != 1 || string(k()[0]) != key {
		t.Errorf("%q, %v", k(), err)
	}
}

// Another key takes the place of the first in three steps, and at no moment is an id unknown that a proxy made that is
// one step behind or ahead. A file that can't be read leaves the keys before it.
func TestUploadKeyRotates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := filepath.Join(t.TempDir(), "upload.key")
		write := func(text string) {
			t.Helper()
			if err := errors.Join(os.WriteFile(name+".new", []byte(text), 0o600), os.Rename(name+".new", name)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Second)
		}
		old, next := strings.Repeat("o", minKey), strings.Repeat("n", minKey)
		write(old + "\n")
		keys, usable, err := uploadKeys(Config{UploadKeyFile: name}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		mine := signer{keys}
		id := session{V: sessionVersion, Repo: "a", S: []part{{"origin-01", someUUID}}}
		behind := newSigner(old)
		for _, step := range []string{old + "\n" + next, next + "\n" + old, next} {
			write(step)
			ahead := newSigner(strings.Split(step, "\n")...)
			for _, made := range []string{mine.seal(id), ahead.seal(id)} {
				for who, s := range map[string]signer{"it": mine, "who is a step behind": behind, "who is a step ahead": ahead} {
					if _, err := s.unseal(made); err != nil {
						t.Errorf("with %q: %s: %v", step, who, err)
					}
				}
			}
			behind = ahead
		}
		if _, err := mine.unseal(newSigner(old).seal(id)); !errors.Is(err, errSession) {
			t.Errorf("a key that was dropped: %v", err)
		}
		for _, wrong := range []string{"", "short", next + "\nshort", strings.Repeat(next+"\n", maxKeys+1)} {
			write(wrong)
			if _, err := mine.unseal(newSigner(next).seal(id)); err != nil || usable() == nil {
				t.Errorf("with the file %.50q: %v, %v", wrong, err, usable())
			}
		}
	})
}
