package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kraken/proto/config"
)

// Modes are of repositories, not of users: a pattern with ${user}, which none would ever match, is refused with words,
// because the repositories that it means would be the node's.
func TestModesAreOfRepositories(t *testing.T) {
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(`rules: [{repositories: ["home/${user}/**"], subjects: [authenticated], allow: [pull]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for pattern, want := range map[string]string{
		"home/*/**": "", "**": "",
		"home/${user}/**": "access.modes[0].repositories: ", "home/x-${user}": "write home/x-*", "home/": "access.modes[0].repositories: ",
	} {
		var m config.Mistakes
		a := Access{Rules: rules, Realm: "http://proxy.test/token", Modes: []AccessMode{{pattern, modeCaller}}}
		a.validate(&m, "access")
		if err := m.Err(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", pattern, err, want)
		}
	}
}
