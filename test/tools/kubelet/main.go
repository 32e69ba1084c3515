// Command kubelet-credentials asks the credential providers of a kubelet's configuration for an image, with kubelet's
// own code, and prints what it would give to the runtime: a JSON list of user names and passwords, best first. What the
// API server would give as the token of the pod's service account is read from a file.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/credentialprovider/plugin"
)

func main() {
	config := flag.String("image-credential-provider-config", "", "a CredentialProviderConfig, as kubelet's flag")
	bin := flag.String("image-credential-provider-bin-dir", "", "the folder of the plug-ins, as kubelet's flag")
	token := flag.String("token", "", "a file with the token of the service account")
	audience := flag.String("audience", "", "the audience that the token has: other requests are refused, as the API server does")
	account := flag.String("service-account", "default/default", "namespace and name of the pod's service account")
	image := flag.String("image", "", "the image that is pulled")
	flag.Parse()
	if err := run(*config, *bin, *token, *audience, *account, *image); err != nil {
		fmt.Fprintln(os.Stderr, "kubelet-credentials:", err)
		os.Exit(1)
	}
}

func run(config, bin, tokenFile, audience, account, image string) error {
	namespace, name, ok := strings.Cut(account, "/")
	if !ok {
		return fmt.Errorf("service account %q: want namespace/name", account)
	}
	serviceAccount := func(string, string) (*core.ServiceAccount, error) {
		return &core.ServiceAccount{ObjectMeta: meta.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-of-" + name)}}, nil
	}
	token := func(_, _ string, r *authentication.TokenRequest) (*authentication.TokenRequest, error) {
		if !slices.Equal(r.Spec.Audiences, []string{audience}) {
			return nil, fmt.Errorf("a token for %q was asked for, this one is for %q", r.Spec.Audiences, audience)
		}
		b, err := os.ReadFile(tokenFile)
		if err != nil {
			return nil, err
		}
		out := r.DeepCopy()
		out.Status.Token = strings.TrimSpace(string(b))
		return out, nil
	}
	if err := plugin.RegisterCredentialProviderPlugins(config, bin, token, serviceAccount); err != nil {
		return err
	}
	found, _ := plugin.NewExternalCredentialProviderDockerKeyring(namespace, "pod", "uid-of-pod", name).Lookup(image)
	if len(found) == 0 {
		return errors.New("no plug-in gave credentials for this image")
	}
	type credentials struct {
		Username string `json:"username"`
		Password string `json:"password"`
	}
	out := []credentials{}
	for _, c := range found {
		out = append(out, credentials{c.Username, c.Password})
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}
