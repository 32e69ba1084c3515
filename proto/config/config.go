// Package config reads strict YAML: a key that nothing knows is an error that names the key, the line and the file.
package config

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// maxFile bounds what is read of a configuration or secret file.
const maxFile = 1 << 20

// Load decodes a file into a pointer to a configuration and, where it has a method Validate() error, validates it. The
// error tells every mistake, with the path of its key and its line. Values may hold ${NAME}, a variable of the
// environment.
func Load(path string, into any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	return Decode(path, f, into)
}

// Decode is Load from a reader; name stands for the file in errors.
func Decode(name string, r io.Reader, into any) error {
	b, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return fmt.Errorf("configuration %s: %w", name, err)
	}
	if len(b) > maxFile {
		return fmt.Errorf("configuration %s: longer than %s", name, Size(maxFile))
	}
	file, err := parser.ParseBytes(b, 0)
	if err != nil {
		return fmt.Errorf("configuration %s: %s", name, strings.TrimSpace(yaml.FormatError(err, false, true)))
	}
	d := decoder{lines: map[string]int{}, anchors: map[string]ast.Node{}}
	bodies := 0
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if bodies++; bodies > 1 {
			return fmt.Errorf("configuration %s: one document is expected, and another follows after a line of ---", name)
		}
		d.value("", doc.Body, reflect.ValueOf(into).Elem())
	}
	if v, ok := into.(interface{ Validate() error }); ok {
		// What could not be decoded is missing now: that alone is no further mistake.
		var more Mistakes
		more.Join("", v.Validate())
		refused := d.mistakes
		for _, m := range more {
			if !refused.about(m.Key) {
				d.mistakes = append(d.mistakes, m)
			}
		}
	}
	d.locate()
	if err := d.mistakes.Err(); err != nil {
		return fmt.Errorf("configuration %s: %w", name, err)
	}
	return nil
}

// locate gives each mistake the line of its key, or of the nearest key around it, and sorts them.
func (d *decoder) locate() {
	for i := range d.mistakes {
		m := &d.mistakes[i]
		for key := m.Key; key != "" && m.Line == 0; key = key[:max(0, strings.LastIndexAny(key, ".["))] {
			m.Line = d.lines[key]
		}
	}
	slices.SortStableFunc(d.mistakes, func(a, b Mistake) int { return cmp.Compare(a.Line, b.Line) })
}

// Duration is a time span, written like 500ms, 5s or 1h30m.
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(strings.TrimSpace(string(b)))
	if err != nil || v < 0 {
		return fmt.Errorf("duration %q: want a number that is not negative, with a unit, e.g. 500ms, 5s, 1h", b)
	}
	*d = Duration(v)
	return nil
}

func (d Duration) String() string { return time.Duration(d).String() }

// Size is a number of bytes, written like 64MiB (powers of 1024), 1GB (powers of 1000) or a plain number.
type Size int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	v, err := humanize.ParseBytes(strings.TrimSpace(string(b)))
	if err != nil || v > 1<<62 {
		return fmt.Errorf("size %q: want bytes, e.g. 64MiB, 1GB, 4096", b)
	}
	*s = Size(v)
	return nil
}

func (s Size) String() string { return humanize.IBytes(uint64(max(s, 0))) }

// Rate is a number of bytes a second, written like 25Mbit/s, 10MiB/s or a plain number of bytes; 0 is unlimited.
type Rate int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Rate) UnmarshalText(b []byte) error {
	text := strings.TrimSuffix(strings.TrimSpace(string(b)), "/s")
	if bits, ok := strings.CutSuffix(text, "bit"); ok {
		scale := 1.0
		for unit, v := range map[string]float64{"k": 1e3, "M": 1e6, "G": 1e9} {
			if n, ok := strings.CutSuffix(bits, unit); ok {
				bits, scale = n, v
			}
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(bits), 64)
		if err != nil || !(v >= 0 && v*scale <= 1e15) { // so written, NaN is refused
			return fmt.Errorf("rate %q: want e.g. 25Mbit/s", b)
		}
		if v > 0 && v*scale < 8 {
			return fmt.Errorf("rate %q: is less than a byte a second, and 0 would be unlimited", b)
		}
		*r = Rate(v * scale / 8)
		return nil
	}
	var s Size
	if err := s.UnmarshalText([]byte(text)); err != nil {
		return fmt.Errorf("rate %q: want e.g. 25Mbit/s, 10MiB/s or 0", b)
	}
	*r = Rate(s)
	return nil
}

// MarshalText writes bytes a second, which UnmarshalText reads back.
func (r Rate) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(r), 10), nil }

func (r Rate) String() string {
	if r == 0 {
		return "unlimited"
	}
	return Size(r).String() + "/s"
}

// Literal is a text in which ${NAME} is no variable of the environment.
type Literal string

// Secret is a value that never shows in logs. In YAML it is a text, or file:<path> for the content of a file.
type Secret struct{ value string }

// NewSecret wraps a value.
func NewSecret(v string) Secret { return Secret{v} }

// Value is the secret itself.
func (s Secret) Value() string { return s.value }

func (s Secret) String() string { return "[redacted]" }

// GoString keeps %#v from showing the value.
func (s Secret) GoString() string { return s.String() }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Secret) UnmarshalText(b []byte) error {
	path, ok := strings.CutPrefix(string(b), "file:")
	if !ok {
		s.value = string(b)
		return nil
	}
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return fmt.Errorf("secret: %w", err)
	}
	defer f.Close()
	v, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return fmt.Errorf("secret: %w", err)
	}
	s.value = strings.TrimRight(string(v), "\r\n")
	return nil
}
