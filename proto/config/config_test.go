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
	for _, s := range []string{"inner: {deep: [}", "inner: {deep: &a 3}\nname: *a\n", "name: ${X\n", "<<: {name: y}\n", "name: !!str 1\n", "? [a]\n: b\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s sample
		if err := Decode("f", strings.NewReader(text), &s); err == nil && s.Name == "bad" {
			t.Error("validation was skipped")
		}
	})
}

// TestVariables: ${NAME} is a value's, never YAML's, and one that is not set is refused with its key.
func TestVariables(t *testing.T) {
	t.Setenv("KRAKEN_NAME", "a: {b: c}\n- x")
	t.Setenv("KRAKEN_DEEP", "7")
	t.Setenv("KRAKEN_EMPTY", "")
	var s sample
	text := "name: x ${KRAKEN_NAME}${KRAKEN_EMPTY} $${KRAKEN_NAME} $5\ninner: {deep: \"${KRAKEN_DEEP}\"}\n"
	if err := Decode("f.yaml", strings.NewReader(text), &s); err != nil {
		t.Fatal(err)
	}
	if want := "x a: {b: c}\n- x ${KRAKEN_NAME} $5"; s.Name != want || s.Inner.Deep != 7 {
		t.Errorf("decoded %+v, want the name %q", s, want)
	}
	for text, want := range map[string]string{
		"name: ${KRAKEN_NONE}-${KRAKEN_NIL}\n": "line 1: name: ${KRAKEN_NONE}, ${KRAKEN_NIL} is not set",
		"name: ${}\n":                          "name: \"${}\"",
		"name: ${kraken-name}\n":               "write $${",
		"inner:\n  deep: ${KRAKEN_NAME}\n":     "line 2: inner.deep: ",
		"${KRAKEN_NAME}: x\n":                  "unknown key",
		"inner: {deep: \"${KRAKEN_EMPTY}\"}\n": "whole number",
		"wait: ${KRAKEN_DEEP}\n":               "duration",
		"key: ${KRAKEN_NONE}\nspace: many\n":   "2 mistakes",
	} {
		if err := Decode("f.yaml", strings.NewReader(text), new(sample)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestAnchors: what YAML has for saying a thing once works as it did.
func TestAnchors(t *testing.T) {
	var s struct {
		One struct {
			Name string `yaml:"name"`
		} `yaml:"one"`
		Two struct {
			Name string `yaml:"name"`
		} `yaml:"two"`
		Text string `yaml:"text"`
	}
	if err := Decode("f.yaml", strings.NewReader("one: &o {name: x}\ntwo: {<<: *o}\ntext: |\n  a\n  b\n"), &s); err != nil || s.Two.Name != "x" || s.Text != "a\nb\n" {
		t.Errorf("decoded %+v, %v", s, err)
	}
	for _, text := range []string{"one: &o {name: *o}\n", "one: *nothing\n", "one: [1]\n", "one: x\n", "- x\n", "x\n"} {
		if err := Decode("f.yaml", strings.NewReader(text), &s); err == nil {
			t.Errorf("%q: accepted", text)
		}
	}
}
