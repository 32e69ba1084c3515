package report

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func rows() []Row {
	return []Row{
		AtMost("push", map[string]any{"clients": 16, "size": "1GiB"}, 1.5, "x", 1.5, map[string]any{"kraken_s": 1234.5678, "other_s": 0.25}),
		AtMost("push", map[string]any{"clients": 1}, 1.501, "x", 1.5, nil),
		Below("memory", nil, 150, "MiB", 150, nil),
		AtLeast("rate", nil, 96.5, "MiB/s", 90, nil),
		Plain("copies", nil, 1.1, "x", nil),
	}
}

func TestGoals(t *testing.T) {
	want := []bool{true, false, false, true, true}
	for i, r := range rows() {
		if r.Holds != want[i] {
			t.Errorf("row %d, %v with goal %q: holds is %v", i, r.Value, r.Goal, r.Holds)
		}
	}
	if m := Missed(rows()); len(m) != 2 || m[0].Value != 1.501 || m[1].Row != "memory" {
		t.Errorf("missed: %+v", m)
	}
}

func TestTable(t *testing.T) {
	var b strings.Builder
	if err := Table(&b, rows()); err != nil {
		t.Fatal(err)
	}
	want := `ROW     PARAMS                VALUE  UNIT   GOAL    HOLDS  BESIDE
push    clients=16 size=1GiB  1.5    x      <= 1.5  yes    kraken_s=1234.6 other_s=0.25
push    clients=1             1.501  x      <= 1.5  NO     -
memory  -                     150    MiB    < 150   NO     -
rate    -                     96.5   MiB/s  >= 90   yes    -
copies  -                     1.1    x      -       -      -
`
	if b.String() != want {
		t.Errorf("table:\n%s\nwant:\n%s", b.String(), want)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out", "x.json")
	for _, rs := range [][]Row{rows(), nil} { // the second replaces the first
		if err := WriteFile(path, rs); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var got []map[string]any
		if err := json.Unmarshal(b, &got); err != nil || got == nil || len(got) != len(rs) {
			t.Fatalf("%v, %d rows in\n%s", err, len(got), b)
		}
		for _, r := range got {
			for _, key := range []string{"row", "params", "value", "unit", "goal", "holds", "beside"} {
				if v, ok := r[key]; !ok || v == nil {
					t.Errorf("row %v has no %q", r, key)
				}
			}
		}
	}
}

func TestReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.json")
	if err := WriteFile(path, rows()); err != nil {
		t.Fatal(err)
	}
	got, err := ReadFile(path)
	if err != nil || len(got) != len(rows()) || got[1].Goal != "<= 1.5" || got[1].Holds || got[0].Params["size"] != "1GiB" {
		t.Errorf("%v, %+v", err, got)
	}
	if _, err := ReadFile(path + "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestMedian(t *testing.T) {
	vs := []float64{5, 1, 3}
	if m := Median(vs); m != 3 || vs[0] != 5 {
		t.Errorf("median %v of %v", m, vs)
	}
	if Median([]float64{4, 1, 2, 3}) != 2.5 || Median(nil) != 0 {
		t.Error("medians of four or none")
	}
}
