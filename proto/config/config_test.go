package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type sample struct {
	Name  string   `yaml:"name"`
	Wait  Duration `yaml:"wait"`
	Space Size     `yaml:"space"`
	Speed Rate     `yaml:"speed"`
	Key   Secret   `yaml:"key"`
	Inner struct {
		Deep int `yaml:"deep"`
	} `yaml:"inner"`
}

func (s *sample) Validate() error {
	if s.Name == "bad" {
		return errors.New("name: must not be bad")
	}
	return nil
}

func TestDecode(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(secret, []byte("hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var s sample
	text := "name: x\nwait: 1m30s\nspace: 64MiB\nspeed: 25Mbit/s\nkey: file:" + secret + "\ninner: {deep: 3}\n"
	if err := Decode("f.yaml", strings.NewReader(text), &s); err != nil {
		t.Fatal(err)
	}
	if time.Duration(s.Wait) != 90*time.Second || s.Space != 64<<20 || s.Speed != 3125000 || s.Key.Value() != "hunter2" || s.Inner.Deep != 3 {
		t.Errorf("decoded %+v", s)
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(format, s); strings.Contains(got, "hunter2") {
			t.Errorf("%s shows the secret: %s", format, got)
		}
	}
	if err := Decode("empty.yaml", strings.NewReader(""), &s); err != nil {
		t.Errorf("empty file: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	for text, want := range map[string][]string{
		"nmae: x\n":                {"f.yaml", "nmae", "1"},
		"inner: {deeep: 1}\n":      {"f.yaml", "deeep"},
		"wait: 5\n":                {"f.yaml", "duration"},
		"wait: soon\n":             {"f.yaml", "duration"},
		"space: lots\n":            {"f.yaml", "size"},
		"speed: 3 furlongs\n":      {"f.yaml", "rate"},
		"name: bad\n":              {"f.yaml", "must not be bad"},
		"key: file:/nonexistent\n": {"f.yaml", "secret"},
		"name: [\n":                {"f.yaml"},
		"speed: NaNbit/s\n":        {"f.yaml", "rate"},
		"speed: -1Mbit/s\n":        {"f.yaml", "rate"},
		"name: x\n---\nnmae: y\n":  {"f.yaml", "---"},
		"name: x\n" + strings.Repeat("#\n", 1<<19) + "nmae: y\n": {"f.yaml", "longer"},
	} {
		var s sample
		err := Decode("f.yaml", strings.NewReader(text), &s)
		if err == nil {
			t.Errorf("%q: accepted as %+v", text, s)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q: %v does not mention %q", text, err, w)
			}
		}
	}
}

func TestRates(t *testing.T) {
	for text, want := range map[string]Rate{"0": 0, "10MiB/s": 10 << 20, "8kbit": 1000, "1Gbit/s": 125e6, "100": 100} {
		var r Rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r != want {
			t.Errorf("%q = %d, %v, want %d", text, r, err, want)
		}
		back, err := r.MarshalText()
		var again Rate
		if err != nil || again.UnmarshalText(back) != nil || again != want {
			t.Errorf("%q was written as %q, %v, and read back as %d", text, back, err, again)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("name: x\nwait: 5s\n")
	f.Add("inner: {deep: [}")
	f.Fuzz(func(t *testing.T, text string) {
		var s sample
		if err := Decode("f", strings.NewReader(text), &s); err == nil && s.Name == "bad" {
			t.Error("validation was skipped")
		}
	})
}
