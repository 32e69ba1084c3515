package config

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"kraken/proto/config"
)

// FuzzSamples changes the samples: no role's configuration makes the reader panic, and one that is valid is so again,
// and stays what it was: Validate fills in defaults once.
func FuzzSamples(f *testing.F) {
	for file := range samples() {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(file, string(b))
	}
	f.Add("tracker.yaml", "server: {listen: ':0'}\norigins: [{}]\n")
	f.Fuzz(func(t *testing.T, file, text string) {
		into := samples()[file]
		if into == nil || strings.Contains(text, "file:/") { // which would be opened
			return
		}
		if config.Decode(file, strings.NewReader(text), into) != nil {
			return
		}
		first := reflect.ValueOf(into).Elem().Interface()
		v, ok := into.(interface{ Validate() error })
		if !ok {
			return
		}
		if err := v.Validate(); err != nil {
			t.Errorf("%s was valid, and is not the second time: %v\n%s", file, err, text)
		}
		if second := reflect.ValueOf(into).Elem().Interface(); !reflect.DeepEqual(first, second) {
			t.Errorf("%s: validated again it is %+v, was %+v\n%s", file, second, first, text)
		}
	})
}
